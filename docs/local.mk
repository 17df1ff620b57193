# Manual pages and documents.
dist_doc_DATA += README.md docs/operations.md
