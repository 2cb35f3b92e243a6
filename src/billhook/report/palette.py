"""The colours of the report: one meaning each, the same in every picture, told apart by colour-blind readers too."""

KINDS = {"attention": "#2f86c9", "cross_attention": "#b66aa0", "mlp": "#1a9e77", "block": "#64748b"}
OTHER = "#8b93a1"  # several kinds at once, and everything that is only a reference
CUT = "#dd5f1f"
DENSE = "#8b93a1"
COMPRESSED = "#2f6fb5"

KIND_NAMES = {"attention": "attention", "cross_attention": "cross-attention", "mlp": "MLP", "block": "block"}


def kind_name(kind: str) -> str:
    """How a kind of unit is called in running text."""
    return KIND_NAMES.get(kind, kind.replace("_", " "))
