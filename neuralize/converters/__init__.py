"""From fitted estimators to networks: one converter per class; ``neuralize.converters.all`` registers them."""
