"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """What was wrong and what would be right, in one line.

    The command lines print it as `error: <line>` on stderr and exit with code 2; any other exception is a bug of ours and
    keeps its traceback.
    """
