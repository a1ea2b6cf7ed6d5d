"""The one exception class for what a user can mend."""


class UserError(Exception):
    """Bad input: a run file, a checkpoint, a data file, a mesh.

    The message is one line that names the file, key or tensor, says what is wrong and what to do. The command line
    prints it without a traceback and exits with status 2. Anything else that is raised is a bug and keeps its traceback.

    `agreed` is set where all ranks raise the same error; then rank 0 alone tells it.
    """

    agreed = False


def agreed_error(message: str) -> UserError:
    """The error that all ranks raise together."""
    error = UserError(message)
    error.agreed = True
    return error
