"""Who must be able to load the result."""

from enum import StrEnum


class Target(StrEnum):
    """A constraint on the plan, checked before any search begins.

    - ``uniform``: any engine, as an ordinary checkpoint. Whole blocks, or units of which every block keeps as many.
    - ``deci``: vLLM and llama.cpp, in the DeciLM form. Any sublayer pattern and MLP widths of a Llama-shaped decoder,
      never without the attention of the first block.
    - ``remote``: plain transformers with remote code. Any sublayer pattern and widths.
    - ``any``: Billhook only.
    """

    UNIFORM = "uniform"
    DECI = "deci"
    REMOTE = "remote"
    ANY = "any"
