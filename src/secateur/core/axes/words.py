"""What an axis is called: its kind, read off the operators that meet it, and a name in words."""
from __future__ import annotations
from typing import Any
def kind_of(trace: Any, leaf: Any, members: Any, module: Any) -> str:
    return "feed-forward unit"
def words_for(kind: str, names: Any) -> str:
    return f"{kind}s of " + ", ".join(n.rsplit(".",1)[0] for n in dict.fromkeys(m.rsplit(".",1)[0]+"." for m in names))
