# Manual pages and documents.
dist_doc_DATA += README.md docs/operations.md
dist_doc_DATA += docs/overview.md docs/protocol.md docs/shared-memory.md docs/design.md
dist_doc_DATA += docs/eviction.md docs/eviction.svg
dist_doc_DATA += docs/codecs.md docs/attention.md docs/benchmarks.md docs/grpc.md
