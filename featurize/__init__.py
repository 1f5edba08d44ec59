"""Frozen networks look at every image and caption once; what they say is cached as webdataset shards."""
