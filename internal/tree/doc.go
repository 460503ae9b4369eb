// Package tree walks directory trees without leaving them, builds trees from
// short specifications, and compares trees the slow and plain way.
//
// [Walk] and [WalkParallel] are for production: they hold descriptors and
// never follow a symlink, so a tree may be hostile and may change meanwhile.
// [Build], [Compare] and [Changes] are for tests: they use plain paths and no
// shortcut at all, and are the oracle for everything that is fast.
package tree
