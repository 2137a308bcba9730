"""Define how the parsers of all commands report errors and read a leading ~.

This file imports nothing slow, because `--help` has to answer quickly.
"""

import os

from ..errors import no_such, no_such_flag, one_sentence


def with_home(word: str) -> str:
    """Return a word of a command line, with the home folder in place of the ~ in `~/x` or `--flag=~/x`."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(value)


class OneSentenceErrors:
    """A base class for an ArgumentParser whose errors are one sentence, with a suggested spelling, without the usage.

    A leading ~ in a value is replaced by the home folder, even in `--output=~/x`, where many shells keep the ~.
    """

    def parse_args(self, words: list[str], namespace=None):
        """Return the parsed flags. An unknown flag is reported before a missing argument."""
        words = [with_home(word) for word in words]
        known = self._option_string_actions
        for word in words[: words.index("--") if "--" in words else None]:
            # A text with spaces is a value, e.g. of --original_flags. argparse reads it as one, too.
            name = word.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in known:
                self.error(no_such_flag(word, known))
        arguments, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(no_such_flag(unknown[0], known))
        return arguments

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            self.error(no_such(action.option_strings[0], str(value), list(map(str, action.choices))))

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_sentence(message)}\n")
