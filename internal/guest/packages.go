package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Cache is the directory with what runs share; see the package comment. Its
// methods are called with the lock held.
type Cache struct {
	dir  string
	logf func(string, ...any)
	// fresh is how old an answer of apt may be.
	fresh time.Duration
	// updated says that this run has fetched the package lists.
	updated bool
}

// OpenCache makes the directory; "" means $LAYERFS_CACHE, or layerfs in the
// user's cache directory. update asks for new package lists.
func OpenCache(dir string, update bool, logf func(string, ...any)) (*Cache, error) {
	if dir == "" {
		dir = os.Getenv("LAYERFS_CACHE")
	}
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("no cache directory, set LAYERFS_CACHE: %w", err)
		}
		dir = filepath.Join(base, "layerfs")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	c := &Cache{dir: dir, logf: logf, fresh: 7 * 24 * time.Hour}
	if update {
		c.fresh = 0
	}
	if err := os.MkdirAll(filepath.Join(dir, "debs"), 0o755); err != nil {
		return nil, err
	}
	return c, c.prune()
}

// prune removes what runs that were killed have left. No run lasts a day.
func (c *Cache) prune() error {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "run-") && !strings.HasPrefix(e.Name(), "tmp-") {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // another run has ended
		}
		if err != nil {
			return err
		}
		if time.Since(info.ModTime()) > 24*time.Hour {
			if err := os.RemoveAll(filepath.Join(c.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Dir returns the absolute path of the cache.
func (c *Cache) Dir() string { return c.dir }

// command runs a program and returns its output; the error has what it said.
func command(ctx context.Context, dir string, argv ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(errb.String() + "\n" + out.String())
		if len(text) > 4000 {
			text = "… " + text[len(text)-4000:]
		}
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, text)
	}
	return out.Bytes(), nil
}

// apt runs apt-get with the private directory: its own lists, its own empty
// set of installed packages, its own sources. Nothing of the host changes.
func (c *Cache) apt(ctx context.Context, dir string, args ...string) ([]byte, error) {
	return command(ctx, dir, append([]string{"apt-get", "-c", filepath.Join(c.dir, "apt", "conf"), "-q"}, args...)...)
}

// setup writes the private directory and fetches the package lists.
func (c *Cache) setup(ctx context.Context) error {
	if c.updated {
		return nil
	}
	osRelease, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return err
	}
	m := regexp.MustCompile(`(?m)^VERSION_CODENAME="?([a-z]+)"?$`).FindSubmatch(osRelease)
	if m == nil {
		return errors.New("guest: /etc/os-release has no VERSION_CODENAME")
	}
	src, err := hostSources("/etc/apt", string(m[1]))
	if err != nil {
		return err
	}
	apt := filepath.Join(c.dir, "apt")
	for _, d := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(apt, d), 0o755); err != nil {
			return err
		}
	}
	// The hooks are cleared because they act on the host's directories. The
	// user is named because apt's own may not be able to write here.
	conf := fmt.Sprintf(`Dir::State %[1]q;
Dir::State::status %[2]q;
Dir::Cache %[3]q;
Dir::Etc::sourcelist %[4]q;
Dir::Etc::sourceparts "/dev/null";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Debug::NoLocking "true";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
`, filepath.Join(apt, "state"), filepath.Join(apt, "status"), filepath.Join(apt, "cache"), filepath.Join(apt, "guest.sources"))
	for name, text := range map[string]string{"conf": conf, "guest.sources": src, "status": ""} {
		if err := os.WriteFile(filepath.Join(apt, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	c.logf("updating the package lists of %s", m[1])
	if _, err := c.apt(ctx, "", "update"); err != nil {
		return err
	}
	c.updated = true
	return nil
}

var instLine = regexp.MustCompile(`(?m)^Inst (\S+) \((\S+) `)

// Resolve returns "name=version" of the packages that an empty system would
// install to have the named ones, sorted. The answer is kept for a week; if apt cannot be asked then, the
// old answer is used.
func (c *Cache) Resolve(ctx context.Context, names ...string) ([]string, error) {
	type answer struct {
		Time     time.Time
		Packages []string
	}
	file := filepath.Join(c.dir, "resolved.json")
	known := map[string]answer{}
	if data, err := os.ReadFile(file); err == nil {
		if json.Unmarshal(data, &known) != nil {
			known = map[string]answer{} // a cache: made anew if it is broken
		}
	}
	key := strings.Join(names, " ")
	old, ok := known[key]
	if ok && time.Since(old.Time) < c.fresh {
		return old.Packages, nil
	}
	pkgs, err := c.ask(ctx, names)
	if err != nil {
		if ok {
			c.logf("using packages as of %s: %v", old.Time.Format(time.DateOnly), err)
			return old.Packages, nil
		}
		return nil, err
	}
	known[key] = answer{time.Now(), pkgs}
	data, err := json.MarshalIndent(known, "", "\t")
	if err != nil {
		return nil, err
	}
	return pkgs, replaceFile(file, data)
}

func (c *Cache) ask(ctx context.Context, names []string) ([]string, error) {
	if err := c.setup(ctx); err != nil {
		return nil, err
	}
	out, err := c.apt(ctx, "", append([]string{"install", "-s"}, names...)...)
	if err != nil {
		return nil, err
	}
	var pkgs []string
	for _, m := range instLine.FindAllSubmatch(out, -1) {
		pkgs = append(pkgs, string(m[1])+"="+string(m[2]))
	}
	slices.Sort(pkgs)
	return pkgs, nil
}

// Unpack downloads the packages, each "name=version", and unpacks them into
// one tree below the cache, which is named by their versions. It returns the
// root of the tree.
func (c *Cache) Unpack(ctx context.Context, name string, pkgs []string) (string, error) {
	return c.Once(filepath.Join("trees", name+"-"+digest(pkgs)), func(dir string) error {
		c.logf("unpacking %d packages for %s", len(pkgs), name)
		debs, err := c.download(ctx, pkgs)
		if err != nil {
			return err
		}
		for _, deb := range debs {
			if _, err := command(ctx, "", "dpkg-deb", "-x", deb, dir); err != nil {
				return err
			}
		}
		return nil
	})
}

// deb returns the file of a package, "name=version", or "".
func (c *Cache) deb(pkg string) (string, error) {
	name, version, _ := strings.Cut(pkg, "=")
	m, err := filepath.Glob(filepath.Join(c.dir, "debs", name+"_"+strings.ReplaceAll(version, ":", "%3a")+"_*.deb"))
	if err != nil || len(m) == 0 {
		return "", err
	}
	return m[0], nil
}

// download returns the files of the packages, each "name=version".
func (c *Cache) download(ctx context.Context, pkgs []string) ([]string, error) {
	var missing []string
	for _, p := range pkgs {
		f, err := c.deb(p)
		if err != nil {
			return nil, err
		}
		if f == "" {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		if err := c.fetch(ctx, missing); err != nil {
			return nil, err
		}
	}
	debs := make([]string, len(pkgs))
	for i, p := range pkgs {
		f, err := c.deb(p)
		if err != nil {
			return nil, err
		}
		if f == "" {
			return nil, fmt.Errorf("apt-get download brought no %s", p)
		}
		debs[i] = f
	}
	return debs, nil
}

// fetch downloads packages. They go to a directory of their own first, which
// keeps a download that was cut off away from the others.
func (c *Cache) fetch(ctx context.Context, pkgs []string) error {
	tmp, err := os.MkdirTemp(c.dir, "tmp-deb-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	args := append([]string{"download"}, pkgs...)
	if _, err = c.apt(ctx, tmp, args...); err != nil && !c.updated {
		// The lists may be older than what the mirror still has.
		if err := c.setup(ctx); err != nil {
			return err
		}
		_, err = c.apt(ctx, tmp, args...)
	}
	if err != nil {
		return fmt.Errorf("%w (try -update)", err)
	}
	files, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := os.Rename(f, filepath.Join(c.dir, "debs", filepath.Base(f))); err != nil {
			return err
		}
	}
	return nil
}

// Once returns the directory rel of the cache, filled by fill if it is not
// there. A directory that is there is complete.
func (c *Cache) Once(rel string, fill func(dir string) error) (string, error) {
	dir := filepath.Join(c.dir, rel)
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(c.dir, "tmp-"+filepath.Base(rel)+"-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	if err := fill(tmp); err != nil {
		return "", err
	}
	return dir, os.Rename(tmp, dir)
}

// replaceFile writes a file so that a reader sees the old or the new content.
func replaceFile(name string, data []byte) error {
	tmp := name + ".tmp"
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}
