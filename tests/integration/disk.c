/* A disk as some users have it, preloaded into a command (see disks.py); each part by a variable:
   DISK_FLOCK, DISK_SYNC_FOLDER: the errno of flock, and of fsync of a folder;
   DISK_SYNC_SECONDS: how long fsync of a file named model.params takes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int number(const char *name) {
  const char *value = getenv(name);
  return value ? atoi(value) : 0;
}

int flock(int descriptor, int operation) {
  int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
  errno = number("DISK_FLOCK");
  return errno ? -1 : real(descriptor, operation);
}

static int is_large(int descriptor) {
  char link[64], name[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, name, sizeof name - 1);
  name[length < 0 ? 0 : length] = 0;
  return strstr(name, "model.params") != NULL;
}

int fsync(int descriptor) {
  int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
  struct stat status;
  if (number("DISK_SYNC_FOLDER") && !fstat(descriptor, &status) && S_ISDIR(status.st_mode)) {
    errno = number("DISK_SYNC_FOLDER");
    return -1;
  }
  if (is_large(descriptor)) sleep(number("DISK_SYNC_SECONDS"));
  return real(descriptor);
}
