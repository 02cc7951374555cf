"""What several test folders share: one name for one thing. tests/README.md says where to look."""
