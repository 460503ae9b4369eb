//go:build linux && !(amd64 || s390x || ppc64le || mips64 || mips64le)

package unionfs

// nlinkT is the type of st_nlink.
type nlinkT = uint32
