"""The exceptions that end a command with one line, and their exit statuses."""

STATUS_NOT_FINITE = 3  # max_skipped steps in a row
STATUS_RULE = 5  # evaluate.stop_when was met
STATUS_RANK_LOST = 4  # a rank, or a data loader process of one, died or hangs


class UserError(Exception):
    """Bad input: a run file, a checkpoint, a data file, a mesh.

    The message is one line that names the file, key or tensor, says what is wrong and what to do. The command line
    prints it without a traceback and exits with status 2. Anything else that is raised is a bug and keeps its traceback.

    `agreed` is set where all ranks raise the same error; then rank 0 alone prints it.
    """

    agreed = False


def agreed_error(message: str) -> UserError:
    """The error that all ranks raise together."""
    error = UserError(message)
    error.agreed = True
    return error


class TrainingStopped(Exception):
    """The run ends before its last iteration, for a reason that its one line gives; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def one_line(error: BaseException | None, limit: int = 200) -> str:
    """The message of `error` on one line, cut to `limit` characters, for use inside another message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def named_line(error: BaseException) -> str:
    """The class and the message of `error` on one line, cut to 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
