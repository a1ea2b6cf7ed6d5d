"""The one exception class for what a user can mend."""


class UserError(Exception):
    """Bad input: a run file, a checkpoint, a data file, a mesh.

    The message is one line that names the file, key or tensor, says what is wrong and what to do. The command line
    prints it without a traceback and exits with status 2. Anything else that is raised is a bug and keeps its traceback.
    """
