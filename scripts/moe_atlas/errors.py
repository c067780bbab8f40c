"""The one exception that is shown to a user as a sentence."""


class AtlasError(Exception):
    """Something the user can mend. The message is one sentence: file, row, mend."""


def first_line(error: BaseException) -> str:
    """What another library's error says first, or its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
