"""What others have trained."""

from scorelab.interop.loading import PRETRAINED, RELEASES, load, load_classifier

__all__ = ["PRETRAINED", "RELEASES", "load", "load_classifier"]
