"""The tabs of the page, a file each: `add(model)` lays it out, the function above it is what its buttons do."""
