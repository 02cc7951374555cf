"""Python runs this at start-up wherever this folder is on PYTHONPATH: the way the network guard reaches child processes.

It hides a `sitecustomize` that the machine itself has, so it runs that one afterwards.
"""

import importlib.machinery
import importlib.util
import os
import sys

import network_guard

network_guard.install()

_here = os.path.dirname(os.path.abspath(__file__))
_elsewhere = [entry for entry in sys.path if os.path.abspath(entry) != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _elsewhere)
if _spec is not None and _spec.loader is not None:
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["sitecustomize"] = _module
    _spec.loader.exec_module(_module)
