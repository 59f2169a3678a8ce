"""Bulk sampling: many pictures into a folder, resumable, on any number of processes, and out of it for evaluators."""

from visar.sampling.conditions import Condition, read_classes, read_prompts
from visar.sampling.export import LAYOUTS, export, export_dpg, export_geneval, export_npz
from visar.sampling.folder import RunFolder
from visar.sampling.ranks import Ranks, ToldElsewhere, join_ranks
from visar.sampling.run import Sampled, sample_pictures

__all__ = [
    "LAYOUTS",
    "Condition",
    "Ranks",
    "RunFolder",
    "Sampled",
    "ToldElsewhere",
    "export",
    "export_dpg",
    "export_geneval",
    "export_npz",
    "join_ranks",
    "read_classes",
    "read_prompts",
    "sample_pictures",
]
