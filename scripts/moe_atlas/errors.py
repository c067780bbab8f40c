"""The one exception that is shown to a user as a sentence."""


class AtlasError(Exception):
    """Something the user can mend. The message is one sentence: file, row, mend."""
