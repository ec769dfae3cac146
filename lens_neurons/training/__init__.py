"""Train a small multilingual Llama model on any folders of text: ``python -m lens_neurons.training``.

Folders of ``{language}.txt`` or ``{language}.txt.gz``, one sentence or paragraph a line. A run trains a byte-level BPE
tokenizer and then the model, can be interrupted at any time, and leaves a folder that ``transformers`` loads. The model
that ships with this package was made by it.

On a Linux CPU the environment variables ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` and
``MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184`` make training a fifth faster.
"""

from lens_neurons.training.run import export, train
from lens_neurons.training.trainer import Trainer, TrainingConfig

__all__ = ["Trainer", "TrainingConfig", "export", "train"]
