"""What all axes share: masks, layouts, statistics, selection, units."""
