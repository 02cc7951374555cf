"""From any source of images to a dataset of verified shards."""
