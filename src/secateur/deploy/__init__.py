"""How does the gain become real?"""

from secateur.deploy.depth import drop_blocks, drop_blocks_
from secateur.deploy.merge import merge_blocks, merge_blocks_

__all__ = ["drop_blocks", "drop_blocks_", "merge_blocks", "merge_blocks_"]
