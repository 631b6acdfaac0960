"""A pickle that would run code."""

import os


class RunsCode:
    """An object that creates a file if plain `pickle` loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))
