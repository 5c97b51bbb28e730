"""Choice of the KV blocks that a step attends to, on the device from the queries to the block numbers."""
