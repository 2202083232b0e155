"""Stepladder trains reward models for reasoning, and policies that improve themselves with them.

Read in this order: ``tasks`` (problems and verifiers), ``models`` (policies, reward models, step formats, engines),
``search``, ``data_gen``, ``trainers``, ``launch``. Nothing is imported here, so that ``import stepladder`` costs nothing.
"""

__version__ = "0.1.0"
