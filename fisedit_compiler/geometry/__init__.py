"""A mask at every level: site plans, index tables of convolutions, patches, block sizes, break-even."""
