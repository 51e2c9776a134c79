"""The classic bugs of training loops, found by running the loop and measuring."""
