"""A classifier of digits with hardly any noise, whose last layer is what distances of sets are of:
scorelab evaluate --features digits.
"""

from ml_collections import ConfigDict

from scorelab.experiments import features


def get_config() -> ConfigDict:
    c = features()
    c.data.source, c.data.validation = "digits", 300
    c.model.net.width, c.model.net.multipliers, c.model.net.blocks = 32, (1, 2), 1
    c.model.net.attention, c.model.net.head, c.model.net.dropout = (1,), 32, 0.1
    c.training.steps, c.training.batch_size = 2000, 64
    c.training.checkpoint_every = c.training.validate_every = 500
    c.optim.lr, c.optim.schedule.name, c.optim.ema = 1e-3, "cosine", (0.995,)
    return c
