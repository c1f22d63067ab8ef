"""Problems, error bounds and comparisons that hold a kernel to the definition; see README.md.

Importing this package or any module of it but `strategies` does not import hypothesis.
"""
