"""What others have trained, as a ``ScoreModel``."""
