# libkvd, kvctl and the engines.
