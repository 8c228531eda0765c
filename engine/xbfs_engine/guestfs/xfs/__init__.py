"""XFS 4 and 5, read as the kernel reads it. Facts: "XFS Algorithms & Data Structures", 3rd edition, kernel.org."""
