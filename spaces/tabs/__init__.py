"""The tabs of the page, one file each. `add(model)` lays out a tab, whose buttons run the other functions."""
