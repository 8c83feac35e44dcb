"""Where rows come from: sources, labels, splits, tokens, batches, and the data module over them."""
