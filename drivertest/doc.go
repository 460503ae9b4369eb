// Package drivertest is the definition of a [layerfs.Driver] as tests and
// benchmarks that any driver can run, also one outside of this module.
//
//	func TestMain(m *testing.M) {
//		drivertest.Child(harness)
//		os.Exit(m.Run())
//	}
//
//	func TestConformance(t *testing.T)   { drivertest.Run(t, harness) }
//	func BenchmarkDriver(b *testing.B)   { drivertest.RunBenchmarks(b, harness) }
//	func TestCross(t *testing.T)         { drivertest.Cross(t, harness, other) }
//
// # Oracle
//
// The oracle is a plain directory. A case is a list of steps for each layer;
// the same steps are made in the layer and in the directory, and then both are
// compared in everything a file has: content, type, mode, owner, times in
// nanoseconds, xattrs, hard links, device numbers. What Changes tells is
// compared with a plain double walk over two such directories, and what Diff
// gives is applied elsewhere and compared again.
//
// Both trees are written at different moments, so after each layer every entry
// that was modified "now" gets a time that is computed from its path and the
// number of the layer. An entry that one side should not have touched, or should
// have, shows as a difference of times.
//
// # Deviations
//
// A known difference is data: [Harness.Deviates] names a case and says why. A
// listed case must still fail, so that the list cannot rot; a name that is no
// case is an error.
package drivertest
