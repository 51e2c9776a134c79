"""The page of `loopscope view`: a server that reads runs, and its browser side."""
