"""The proof: dense and compressed model on the same items, in one process."""

from billhook.evaluate.bench import bench
from billhook.evaluate.evidence import Remembered, evidence, evidence_of_each, remembered
from billhook.evaluate.generations import PROMPTS, generate, generations, prepared
from billhook.evaluate.probes import probes
from billhook.evaluate.workload import DEFAULT

__all__ = [
    "DEFAULT",
    "PROMPTS",
    "Remembered",
    "bench",
    "evidence",
    "evidence_of_each",
    "generate",
    "generations",
    "prepared",
    "probes",
    "remembered",
]
