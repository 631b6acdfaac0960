"""A pickle that would run code."""

import os


class RunsCode:
    """Unpickled by plain `pickle`, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))
