package btrfs_test

func crashChild() {}
