"""scorelab: score-based generative modelling around one function, score(x, sigma) = grad_x log p(x; sigma)."""

import lazy_loader

__version__ = "0.1.0"

# what __init__.pyi names is imported when it is asked for: the command line sets up threads before PyTorch starts
__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
# "nn", "data" and the like are left out: a star import must not hide those of others
_QUIET = "adapters checks codecs data divergence evaluation guidance inverse likelihood models nn noise plotting"
__all__ = [name for name in _names if name not in (*_QUIET.split(), "precision", "scores", "training")]
