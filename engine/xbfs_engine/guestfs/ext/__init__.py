"""What ext2/3/4 needs beyond reading: its journal, replayed in memory. Pure; sees only a BlockSource."""
