package sys

// IsStorageXattr reports whether an xattr is how a file system stores something
// that also has a name of its own: xfs lists the POSIX ACLs of a file as
// trusted.SGI_ACL_FILE and trusted.SGI_ACL_DEFAULT, too (fs/xfs/xfs_acl.h). It
// must not travel to other file systems, where it would be one more xattr.
func IsStorageXattr(name string) bool {
	return name == "trusted.SGI_ACL_FILE" || name == "trusted.SGI_ACL_DEFAULT"
}
