"""What people look at: pictures, and the files that samples are written to. Imports core."""
