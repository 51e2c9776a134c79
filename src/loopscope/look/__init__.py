"""Opening up one step: what every part of it has computed.

The step is executed eagerly, on the state as it stands, with observers around Keras's
layers, losses and optimizers. Then the state is set back.
"""
