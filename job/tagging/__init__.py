"""Tag files of any size: parts, seals, and the engines that schedule parts."""
