// Package archive turns tar streams into layers and layers into tar streams,
// and finds what differs between two trees. It needs no driver.
//
//	Apply         tar stream (compressed or not) → directory
//	Write         directory → tar stream of the whole tree
//	WriteChanges  list of changes and the tree they are of → tar stream
//	WriteUpper    upper directory of an overlay or AUFS branch → tar stream
//	Compare       two directories → list of changes
//
// The streams are layers as in the OCI image specification: a deletion is an
// empty file .wh.NAME, a directory that hides what is below it holds a file
// .wh..wh..opq. All tar dialects are read (v7, ustar, pax, GNU, star, old and
// new sparse forms), with xattrs as star or libarchive name them and ACLs as
// text; ustar with pax records is written.
//
// # Trust
//
// A stream is not trusted. Whatever its names, links and whiteouts say,
// nothing outside the target directory is read, written or removed: each
// component of a path is looked up by itself, relative to a descriptor, and
// symbolic links are followed inside the target only. This holds as long as no
// other process that can write to the target renames directories out of it
// while Apply runs.
//
// # Cost
//
// Streams are never held in memory. A stream is read in chunks that go to the
// digest and to the files without being copied in between; all buffers of one
// call together are limited to some 20 MB. What grows with the number of
// entries is one small record for each name (in Apply) or for each file with
// several links (in Write).
package archive
