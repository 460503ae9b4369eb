// Package feature asks the kernel and a file system what they can do, by
// trying it.
//
// An answer is nil for yes, a *layerfs.UnsupportedError for no, and any other
// error if it could not be told (no permission to write, a full disk). A yes
// is only a hint: a seccomp filter may be installed later.
package feature

import (
	"errors"
	"fmt"
	"sync"

	"github.com/layerfs/layerfs"
)

// Feature is what a [Prober] can ask for.
type Feature string

// The features. The second group depends on the directory.
const (
	NewMountAPI  Feature = "new mount API"            // fsopen(2), Linux 5.2, commit 24dcb3d90a1f
	LowerAppend  Feature = "overlay lowerdir+"        // Linux 6.8, commit 24e16e385f22
	MountSetattr Feature = "mount_setattr"            // Linux 5.12, commit 2a1867219c7b
	OpenAt2      Feature = "openat2"                  // Linux 5.6, commit fddb5d430ad9
	SysAdmin     Feature = "capability CAP_SYS_ADMIN" // effective in the process
	Mknod        Feature = "capability CAP_MKNOD"     // and in the first user namespace, where it counts

	Overlay          Feature = "overlay"                 // as upper layer: whiteouts, opaque directories, trusted xattrs; Linux 4.0
	OverlayUserXattr Feature = "overlay userxattr"       // Linux 5.11, commit 2d2f2d7322ff
	Metacopy         Feature = "overlay metacopy"        // Linux 4.19, commit d5791044d2e5
	RedirectDir      Feature = "overlay redirect_dir"    // Linux 4.10, commit a6c606551141
	Index            Feature = "overlay index"           // Linux 4.13, commit 02bcd1577400
	XIno             Feature = "overlay xino"            // Linux 4.17, commit 795939a93e60
	Volatile         Feature = "overlay volatile"        // Linux 5.10, commit c86243b090bc
	XattrWhiteout    Feature = "overlay xattr whiteouts" // Linux 6.7, commit bc8df7a3dc03
	IDMap            Feature = "idmapped mount"          // per file system; Linux 5.12, commit 9caccd41541a
	OverlayIDMap     Feature = "idmapped overlay layers" // detached; Linux 6.15
	Reflink          Feature = "reflink"                 // FICLONE, Linux 4.5
	DType            Feature = "d_type"                  // readdir tells file types
	ProjectQuota     Feature = "project quota"           // xfs, ext4 (Linux 4.5), f2fs
)

// features lists all, for Status and tests.
func features() []Feature {
	return []Feature{
		NewMountAPI, LowerAppend, MountSetattr, OpenAt2, SysAdmin, Mknod, Overlay, OverlayUserXattr, Metacopy,
		RedirectDir, Index, XIno, Volatile, XattrWhiteout, IDMap, OverlayIDMap, Reflink, DType, ProjectQuota,
	}
}

// Prober answers for one driver. The zero value is ready; it must not be
// copied. It is safe for concurrent use.
//
// A no is kept for the life of the prober, a yes and a could-not-tell are not:
// a probe costs up to some hundred microseconds, so callers ask once in New.
type Prober struct {
	// Force replaces answers, in tests. It must not change after first use.
	Force map[Feature]error

	mu sync.Mutex // guards no
	no map[question]error
}

type question struct {
	feature Feature
	dir     string
}

// Probe answers whether f is there, for features of file systems at dir: a
// directory that can be written, in which a temporary directory is made and
// removed. The other features ignore dir.
func (p *Prober) Probe(f Feature, dir string) error {
	if err, ok := p.Force[f]; ok {
		return err
	}
	q := question{f, dir}
	p.mu.Lock()
	err, ok := p.no[q]
	p.mu.Unlock()
	if ok {
		return err
	}
	err = probe(f, dir)
	if u := (*layerfs.UnsupportedError)(nil); errors.As(err, &u) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.no == nil {
			p.no = make(map[question]error)
		}
		p.no[q] = err
	}
	return err
}

// Has reports whether the answer of [Prober.Probe] is yes.
func (p *Prober) Has(f Feature, dir string) bool { return p.Probe(f, dir) == nil }

func unknown(f Feature) error { return fmt.Errorf("[bug] unknown feature %q", string(f)) }
