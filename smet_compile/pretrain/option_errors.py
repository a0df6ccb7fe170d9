"""Rewords errors of the library for the command line: options take the place of arguments."""

import re
from collections.abc import Mapping


def name_options(error: Exception, options: Mapping[str, str]) -> ValueError:
    """Returns the error with options in place of the arguments that it names, as `options` maps them.

    It replaces the argument that begins the message and, further on, each one that stands before "=" or has an
    underscore. Other words stay, since "every" and "data" are English too.
    """
    text = re.sub(r"\A(\w+)(?=[:\[])", lambda found: options.get(found[1], found[1]), str(error))
    text = re.sub(r"(?<![\w.-])(\w+)=(?=([\w\"'])?)", lambda found: _before_value(found, options), text)
    return ValueError(re.sub(r"(?<![\w.-])\w+_\w+", lambda found: options.get(found[0], found[0]), text))


def _before_value(found: re.Match[str], options: Mapping[str, str]) -> str:
    option = options.get(found[1])
    return found[0] if option is None else option + " " * (found[2] is not None)
