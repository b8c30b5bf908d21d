"""The names and argument orders of the code published with the paper: `codec` and `scrub`.

:func:`install` puts them where unmodified scripts look for them.
"""

from lcodec_ext.compat.installed import Installed, install, uninstall

__all__ = ["Installed", "install", "uninstall"]
