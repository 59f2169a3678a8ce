"""Bulk sampling: many images into a folder, resumable, with any number of processes, and exports for evaluators."""

from visar.bulk.conditions import Condition, read_classes, read_prompts
from visar.bulk.export import LAYOUTS, export, export_dpg, export_geneval, export_npz
from visar.bulk.folder import RunFolder
from visar.bulk.ranks import Ranks, ToldElsewhere, join_ranks
from visar.bulk.run import Sampled, check_run, sample_images

__all__ = [
    "LAYOUTS",
    "Condition",
    "Ranks",
    "RunFolder",
    "Sampled",
    "ToldElsewhere",
    "check_run",
    "export",
    "export_dpg",
    "export_geneval",
    "export_npz",
    "join_ranks",
    "read_classes",
    "read_prompts",
    "sample_images",
]
