package archive

import (
	"path"
	"strings"

	"github.com/layerfs/layerfs/whiteout"
)

// plinkTemp keeps the sources of AUFS pseudo-links while a layer is unpacked.
// It is a name no layer can have.
const plinkTemp = whiteout.MetaPrefix + "layerfs-plnk"

// maxName is NAME_MAX of Linux, in bytes; AUFS has whiteouts only for names
// that are shorter than that by the prefix.
const (
	maxName     = 255
	maxAUFSName = maxName - len(whiteout.Prefix)
)

// hiddenName is [whiteout.Target] for a name in a stream, which may be longer
// than that of a file. What it hides may not.
func hiddenName(base string) (string, bool, error) {
	target, ok, err := whiteout.Target(base)
	if ok && len(target) > maxName {
		return "", false, malformed("whiteout of a name of %d bytes, more than %d", len(target), maxName)
	}
	return target, ok, err
}

// cleanName returns a name without leading slash, "." and "..", which cannot
// lead out: a ".." at the root stays there.
func cleanName(name string) string {
	name = path.Clean(strings.TrimLeft(name, "/"))
	if name == "." {
		return ""
	}
	if name == ".." || strings.HasPrefix(name, "../") {
		return path.Clean("/" + name)[1:]
	}
	return name
}

func splitName(name string) (dir, base string) {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i], name[i+1:]
	}
	return "", name
}

// maxLinks is how many links one look-up follows, as in the kernel.
const maxLinks = 40

// checkDevice returns an error if the kernel cannot have such a device:
// 12 bits of major and 20 of minor number, include/linux/kdev_t.h.
func checkDevice(h *header) error {
	if h.major > 1<<12-1 || h.minor > 1<<20-1 {
		return malformed("device number %d:%d is out of range", h.major, h.minor)
	}
	return nil
}

// maxLinkPasses bounds the work for links to links whose order is adverse.
const maxLinkPasses = 100
